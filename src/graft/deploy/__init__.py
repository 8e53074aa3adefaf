"""From a run to an application: predictions, exported models, a server, a model card."""
