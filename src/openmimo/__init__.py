"""OpenMiMo: the MiMo-V2-Flash system in one Python package."""

__version__ = "0.1.0"
