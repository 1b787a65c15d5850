"""Input that means harm, for everything in this tool that reads what others wrote.

`mutation` bends what is good, so that most inputs get far; `parsers` is the registry: each parser, how its inputs are
made, and which errors are its answer. `tests/unit/test_hostile_input.py` tries a few hundred of each with Hypothesis,
`./dev fuzz` as many as there is time for. An input is made by a random.Random and nothing else: seed and number make it
again.

A new parser is one row of `parsers.PARSERS`.
"""
