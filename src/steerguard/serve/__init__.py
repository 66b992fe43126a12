"""Serving: an OpenAI-compatible server under which a guard cannot be asked away.

    policy_file, policy    what the operator decided, and what that means for one request (`decide`)
    protocol               what a request may say, and how an answer is written
    engine, measure        many requests, one model; what the guards saw and did
    service                the policy in force, whether answers may leave, what is written down
    app, stream            HTTP
    vllm                   the same policy for vLLM's own server

Nothing here knows a rule by name. What needs the extra is imported by `app`, `telemetry` and `run` alone.
"""
