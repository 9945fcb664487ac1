"""How it is said and shown: tables, sentences, charts, pages and the model card's part."""
