"""Exports of a model that another runtime computes: found or made, opened, and put in the place of the transformers model."""
