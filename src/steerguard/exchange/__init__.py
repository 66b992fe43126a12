"""Exchange with other tools: what of ours they can run, and what of theirs can be fitted on.

`export_gguf` writes a guard that is a plain shift as a llama.cpp control vector. `read_directions` reads the steering
vectors of other tools, so that `fit_statistics` can find where a model's own answers stand on them.

What this room refuses: to write a file that does something else than the guard, and to open a file that could run code.
"""

from steerguard.exchange.control_vector import control_vector, export_gguf
from steerguard.exchange.directions import read_directions

__all__ = ["control_vector", "export_gguf", "read_directions"]
