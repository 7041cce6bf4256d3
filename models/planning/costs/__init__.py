"""What imagined futures cost: intrinsic costs and the critic. Imports the memory."""
