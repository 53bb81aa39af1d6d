"""The rules, by kind. A kind is a module here; a rule is a function in it."""

from ddp_tutorial.check.judge.registry import RULES
from ddp_tutorial.check.judge.rules import calls, files, gradients, meeting, model, randomness, samples, steps

KINDS = (meeting, calls, model, steps, gradients, samples, randomness, files)  # a cause before what follows from it
RULES.sort(key=lambda rule: [kind.__name__ for kind in KINDS].index(rule.function.__module__))
