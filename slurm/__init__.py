"""Studies on a SLURM cluster: `python slurm/submit.py`, or `python -m slurm.submit`.

It stays empty: a job imports it before submitit listens to signals.
"""
