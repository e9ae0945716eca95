"""The version, here so that the packaging and the commands read it without the package's public names."""

__version__ = "0.1.0"
