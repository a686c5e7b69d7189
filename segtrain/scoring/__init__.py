"""From answers to figures: rules, counts, inference, reports."""
