"""What distill is measured against, and how: for the recipes that measure it. Nothing else imports this."""
