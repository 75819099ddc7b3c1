"""torch -> a quantized ONNX model directory."""
