"""Experts that are PEFT adapters of any type."""
