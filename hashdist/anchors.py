"""Anchors: a few points that stand for all training images, and kernels to them."""
