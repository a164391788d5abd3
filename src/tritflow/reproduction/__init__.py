"""From a dense FLUX folder to the paper's tables and figures, stage by stage; what `tritflow reproduce` runs."""
