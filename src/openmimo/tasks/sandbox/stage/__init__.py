"""What runs inside the sandbox's own processes: set-up, then the program. Standard library only, relative imports only.

The folder is imported as a top-level package there, so that nothing else of OpenMiMo is loaded or can be reached.
"""
