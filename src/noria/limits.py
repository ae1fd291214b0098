"""Numbers that several rooms keep: what the plan counts and the engine does, each said once."""

DTYPES = ("float64", "float32", "bfloat16", "float16")
TIERS = ("gpu", "cpu", "disk")
MAX_GROUPS = 10_000  # MPI promises tags up to 32767: two kinds of messages are numbered by group
