"""Figures and tables of the MiMo-V2-Flash report, measured again on small models."""
