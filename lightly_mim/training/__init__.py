"""What every training run needs and no method: pretraining and fine-tuning stand on it.

- `module`: the LightningModule beneath: NaN, clipping, speed, mid-epoch resume.
- `trainer`: one way to make a Trainer and to fit with it.
- `saving`: checkpoints between two batches, whole or not at all.
- `signals`: what SIGTERM, SIGUSR2 and a cluster's preemption do.
- `machine`: processes, devices and precision, also where SLURM started them.
- `cuda`: all that holds on CUDA alone.
- `logs`: `metrics.csv`, the bar, the lines in a log.
"""
