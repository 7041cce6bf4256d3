"""What imagined futures cost: intrinsic costs and the critic. Imports memory and pairs."""
