"""Launchers, rendezvous, strategies of several processes, and the uses of private parts of Lightning and DeepSpeed."""
