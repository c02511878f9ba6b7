"""Pools of tools of different speeds, one tool each."""
