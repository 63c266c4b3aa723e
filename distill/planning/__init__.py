"""What a run will need, before it: memory by term and disk from arithmetic, then time from a rehearsal.

A rehearsal is the run itself in little: the student is built, and 20 steps are trained, on vectors drawn at random that stand
for the teacher's in a store of their own, which is deleted. The teacher computes only as much as tells its speed.
"""

from distill.planning.printing import plan

__all__ = ["plan"]
