"""Pure decisions: graphs, plans, simulation. Never imports torch, a clock or a device."""
