"""Floor 4: who decides. Appraises evidence, releases keys, keeps budgets and the log, under the owner's policy."""
