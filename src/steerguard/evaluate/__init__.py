"""Evaluation: what a guard costs and brings beyond its trait, always beside the unguarded model.

Every part is a function that gives a frozen result; each is imported from its own module:

* `mt_bench`, `alpaca`: capability in free text, graded by a judge that is never the model under test
* `turns`: long conversations with a scripted user: repetition, trait and coherence by turn, a guard on and then off
* `controls`: other directions and other rules at the same displacement; `prompting`: prompts in a guard's stead
* `sections`: all of it as parts of one evaluation; `running` runs them, `card` is what comes of it, `gate` what a build demands
* `provider`: a guarded model as a model of inspect-ai (`steerguard/NAME`), for its many tasks; `tasks`: ours for it

It knows backends, scorers and judges. It ships no benchmark's data.
"""

from __future__ import annotations

BATCH = 32
"""Rows that are answered at a time, unless it is said otherwise; what an answer says does not depend on it."""
