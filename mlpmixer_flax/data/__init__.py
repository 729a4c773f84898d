"""Datasets, images and augmentation: everything between a file on disk and the model's input."""
