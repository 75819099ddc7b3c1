"""Other people's models in torch: encoders, language models and whole vision-language models."""
