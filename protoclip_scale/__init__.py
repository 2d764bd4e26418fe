"""Pretraining of image-text models: CLIP, ProtoCLIP and their relatives, from one machine to a cluster."""

__version__ = "0.1.0"
