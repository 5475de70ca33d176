"""Tests that start a real vLLM engine; a module starts at most a few."""
