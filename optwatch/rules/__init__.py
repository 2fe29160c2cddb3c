"""Update rules: found by name. A folder holds one rule, or those that options make of one."""

from __future__ import annotations

from optwatch.rules.adadelta.rule import Adadelta
from optwatch.rules.adagrad.rule import Adagrad
from optwatch.rules.adam.rule import Adam
from optwatch.rules.adamw.rule import AdamW
from optwatch.rules.ademamix.rule import AdEMAMix
from optwatch.rules.amsgrad.rule import AMSGrad
from optwatch.rules.base import Rule, Slot
from optwatch.rules.lamb.rule import LAMB
from optwatch.rules.lion.rule import Lion
from optwatch.rules.rmsprop.rule import RMSprop
from optwatch.rules.sgd.rule import SGD, SGDMomentum
from optwatch.rules.sophiag.rule import SophiaG

__all__ = ["RULES", "Rule", "Slot"]

#: The update rules by name.
RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        AdamW(),
        AMSGrad(AdamW()),
        Adam(),
        AMSGrad(Adam()),
        SGD(),
        SGDMomentum(),
        RMSprop(centered=False, momentum=False),
        RMSprop(centered=False, momentum=True),
        RMSprop(centered=True, momentum=False),
        RMSprop(centered=True, momentum=True),
        Adagrad(),
        Adadelta(),
        Lion(),
        LAMB(),
        AdEMAMix(),
        SophiaG(),
    )
}
