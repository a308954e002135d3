"""What people look at: a report on a model, pages found for a query, the card of an exported model."""
