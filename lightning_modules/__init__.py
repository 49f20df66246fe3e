"""One LightningModule per stage, and what they share: optimisers, callbacks, metrics."""
