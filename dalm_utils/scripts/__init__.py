"""Commands for those who make what ships: the bases, the recorded ablation, the stored notebooks."""
