"""Weights to start from: which exist, where they are, how their files are read, how they are adapted to a model."""
