"""What every family stands on. Nothing in here imports a family or a flow."""
