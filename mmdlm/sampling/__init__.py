"""The one loop, and the policies, draws and predictors it is called with."""
