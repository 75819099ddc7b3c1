"""Torch modules, data and stages that train what the runtime reads."""
