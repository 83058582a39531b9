"""Carries out a plan, and leaves a complete folder."""
