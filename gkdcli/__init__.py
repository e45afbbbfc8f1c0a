"""gkd: generative feature knowledge distillation for video action networks."""
