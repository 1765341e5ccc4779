"""Experts on other hosts: how their workers are reached, who is let in, and the process that serves one."""
