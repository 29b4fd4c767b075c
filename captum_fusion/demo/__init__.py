"""Trained networks and pictures for trying out explanations without a download.

- :mod:`captum_fusion.demo.photographs`: SqueezeNet 1.1, trained on ImageNet, and photographs of its classes. The
  command line calls the network ``bundled``.
- :mod:`captum_fusion.demo.digits`: a small network and scenes with handwritten digits whose masks are exact. The
  command line calls both ``digits``.
"""
