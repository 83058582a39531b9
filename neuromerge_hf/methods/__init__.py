"""The merging methods. Each file has a method's configuration, its functions, and the class that the engine calls.

Importing a method does not import torch. Functions that compute import it when they are called.
"""
