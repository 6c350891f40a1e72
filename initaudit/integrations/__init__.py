"""For training code: one file a framework, each importing its framework and nothing that others need.

`initaudit.integrations.lightning.InitauditCallback` and `initaudit.integrations.transformers.InitauditCallback`.
"""
