"""Pictures in any layout to training batches."""
