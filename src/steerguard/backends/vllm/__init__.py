"""The vLLM backend: a plugin for stock vLLM, inside its compiled graph, and safe with its prefix cache."""
