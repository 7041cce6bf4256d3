"""The planning application: what its ingress and planner share. Imports ingress and replicas."""
