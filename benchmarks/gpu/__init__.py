"""Measure every claim about GPUs with one command that can be interrupted at any time.

The measurement consists of parts. Each part runs in its own process with a time limit and writes its results after
every step. The same command continues an interrupted measurement. On a CPU with a small checkpoint it is a rehearsal.
"""
