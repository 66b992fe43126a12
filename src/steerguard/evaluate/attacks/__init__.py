"""Attacks: does the guard hold against somebody who wants it not to, and does it notice?

    result = attacks(model, trait.test, guard, wordings(texts("honesty"), shots), scorer=scorer, benign=prompts)
    print(result)

* `wordings`: what is written differently: held-out wordings, role-play, encodings, other languages, examples, orders to resist
* `suffix`: a white-box attacker who optimises tokens through the acting guard; the same budget without gradients as its control
* `poison`: swapped labels among the pairs that the probe is fitted on
* `monitor`: the guard as a detector
* `trial`, `run`: one attack in both arms; many of them

An attack that does not make the *unguarded* model misbehave is no attack, and its failure no success of the guard: every result
has both rates, and says so. It knows backends, scorers and guards. It knows no judge's questions and no command line.
"""

from __future__ import annotations
