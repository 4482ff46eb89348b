"""How a configuration becomes a run: composed, checked, trained, saved, resumed."""
