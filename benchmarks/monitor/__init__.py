"""How often a monitor alarms on healthy training runs, how soon it notices faults that begin in one, and its cost."""
