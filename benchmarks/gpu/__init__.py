"""bench on a GPU, part by part: what is claimed for one, measured in one command that may be cut off anywhere.

Each part runs in a process of its own, bounded in time, and writes what it has after each of its steps. Run again, it
goes on where it was. On a CPU, with a shortened checkpoint, the same command is its own rehearsal.
"""
