"""How well a first-order model of the loss predicts what pruning does to it, measured along a pruning run."""

from pins_ext.studies.diagnosis.changes import Change, Diagnosis
from pins_ext.studies.diagnosis.exchanges import Exchange, Exchanges

__all__ = ["Change", "Diagnosis", "Exchange", "Exchanges"]
